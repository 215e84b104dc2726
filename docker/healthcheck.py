"""Ends with 0 where an address answers a GET with 200, and with 1 and one line elsewhere: `healthcheck.py URL`."""

import sys
import urllib.error
import urllib.request


def main() -> int:
    """Ask once."""
    url = sys.argv[1]
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return 0 if reply.status == 200 else 1
    except (urllib.error.URLError, OSError, ValueError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
