"""Plans for chips that are not there: topologies, chips, compiled programs, FLOPs, reports."""
