"""What launch.py hands to the nodes, in environment variables."""

# Two have defaults: seconds to wait for another node while training, and before.
TIMEOUT, JOIN_TIMEOUT = ("NODE_TIMEOUT", "30"), ("NODE_JOIN_TIMEOUT", "300")
HAS_BEGUN = "NODE_HAS_BEGUN"  # names a file that a node writes to once it trains: restarted, it resumes despite --fresh
