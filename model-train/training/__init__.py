"""The life of a training: what it is asked for, what it does, and what it leaves in the volume."""
