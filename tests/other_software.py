"""Software of others that tests ask about our files; they skip, with the reason, where it is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NODE_MODULES = Path(os.environ.get("PRD_NODE_MODULES", "node_modules")).absolute()
VALIDATE = """
const validator = require(process.argv[1]), fs = require('fs');
validator.validateBytes(new Uint8Array(fs.readFileSync(process.argv[2])))
  .then(report => console.log(JSON.stringify(report.issues)));
"""


def gltf_issues(path: Path) -> dict[str, Any]:
    """What the Khronos validator says of a .glb or .gltf: numErrors, numWarnings, messages.

    `npm install gltf-validator` in any folder, its `node_modules` named by the variable PRD_NODE_MODULES.
    """
    package = NODE_MODULES / "gltf-validator"
    if shutil.which("node") is None or not package.is_dir():
        pytest.skip("needs node and gltf-validator; see tests/other_software.py")
    command = ["node", "-e", VALIDATE, str(package), str(path)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def chromium() -> str:
    """Place of a Chromium: on the path, or named by the variable PRD_CHROMIUM."""
    found = os.environ.get("PRD_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium, or its place in PRD_CHROMIUM")
    return found
