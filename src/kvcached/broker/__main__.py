"""Start of the broker's process, as quick as Python allows: run by path, without ``site``.

Arguments: see ``kvcached.broker.server.main``. The process that starts it waits only for the
first of the two processes here, so nobody has to reap the broker.
"""

import os
import sys

if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from kvcached.broker.server import main

    sys.exit(main(sys.argv[1:]))
