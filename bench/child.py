"""One figure for one client, in a process of its own.

    python child.py CASE FIGURE CLIENT ORIGIN QUICK

The last line of the output is the result as JSON.
"""

import importlib
import json
import sys


def main() -> None:
    case, name, client, origin, quick = sys.argv[1:]
    figures = importlib.import_module(f"cases.{case}").FIGURES
    from figure import Job

    # From here on a client's own imports must not find the harness's modules.
    del sys.path[0]
    figure = next(f for f in figures if f.name == name)
    print(json.dumps(figure.work(Job(client, origin, sys.executable, quick == "1"))))


if __name__ == "__main__":
    main()
