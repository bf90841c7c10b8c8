"""The commands of `butterfly`, a module each: a dataclass whose fields are the options, and `run`."""
