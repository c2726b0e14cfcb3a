"""Checks that the service in this container is ready: Docker's health check. The exit status is 0 if it is, else 1.

In the container: python /opt/app/web/health.py PORT
"""

import http.client
import json
import sys


def main() -> int:
    """Request the service's state, print it, and return the exit status."""
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=3)
    try:
        connection.request("GET", "/health-check")
        health = json.load(connection.getresponse())
        print(health["status"], health["setup"]["logs"])
        return 0 if health["status"] in ("READY", "BUSY") else 1
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
