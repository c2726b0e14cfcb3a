"""Train on several nodes. This file says what a node does; distributed.py is how nodes talk to each other."""

TIMEOUT_VARIABLE = "NODE_TIMEOUT"  # seconds to wait for another node; launch.py sets it
TIMEOUT = 30
LOST_NODE = 75  # the exit status after another node was lost: EX_TEMPFAIL of sysexits.h, since trying again may help
