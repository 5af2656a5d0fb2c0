"""What memwatch says of a finished run, against what its generations copy."""
