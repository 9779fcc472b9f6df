"""A sentence becomes a textured mesh.

    python examples/generate.py "a red cube on a blue cylinder" -o cube.glb
    python examples/generate.py "a dragon" --adapter runs/mine --device cuda -o dragon.glb

The same as the command `prd generate`.
"""

import sys

from prd.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
