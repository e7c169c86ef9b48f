"""A judge for `stagemix win_rate --judge`: the longer answer wins. It shows the protocol, not a good judge.

Reads one JSON object a line, {"prompt", "a", "b"}, and writes one a line, {"winner": "a" | "b" | "tie"}.
"""

import json
import sys

for line in sys.stdin:
    duel = json.loads(line)
    difference = len(duel["a"]) - len(duel["b"])
    print(json.dumps({"winner": "tie" if difference == 0 else "a" if difference > 0 else "b"}))
