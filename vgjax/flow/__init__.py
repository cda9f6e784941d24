"""Rectified flow without parameters: path, time, steppers, guidance. `t=0` is noise, `t=1` is data."""
