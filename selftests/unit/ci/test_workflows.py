"""Check the calls of the lab in docs/ci.md: found, and turned into calls inside the lab's repository."""

from __future__ import annotations

import yaml

from ci.setup_checkout import ROOT
from ci.workflows import calls

TEXT = """
```yaml
jobs:
  a:
    uses: OWNER/wg-interop/.github/workflows/interop.yml@main
```
```yaml
steps:
  - uses: OWNER/wg-interop@main
    with:
```
```yaml
uses: actions/checkout@v4
```
"""


def test_calls_of_lab_become_local() -> None:
    assert calls(TEXT) == [
        "jobs:\n  a:\n    uses: ./.github/workflows/interop.yml\n",
        "steps:\n  - uses: ./\n    with:\n",
    ]


def test_docs_show_action_and_reusable_workflow() -> None:
    action, workflow = (yaml.safe_load(call) for call in calls((ROOT / "docs" / "ci.md").read_text()))
    assert action["jobs"]["interop"]["steps"][-1]["uses"] == "./"
    assert workflow["jobs"]["interop"]["uses"] == "./.github/workflows/interop.yml"
