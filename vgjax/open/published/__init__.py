"""Published classes, one of our models a file: `published` fields, `weights` table, `inputs` of the smallest call."""
