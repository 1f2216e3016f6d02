"""Plug the lab into pytest: options, fixtures, sandbox, guests, verdicts, results.

This file only names the modules, so that loading the plugin costs next to nothing.
"""

pytest_plugins = [
    "harness.plugin.options",
    "harness.plugin.selection",
    "harness.plugin.hooks",
    "harness.plugin.fixtures",
    "harness.plugin.verdicts",
    "harness.plugin.assertions",
    "harness.plugin.reporter",
    "harness.plugin.alone",
    "harness.plugin.reruns",
    "harness.plugin.phases",
]
