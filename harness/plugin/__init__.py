"""Name the modules of the pytest plugin, so that loading it costs next to nothing."""

pytest_plugins = [
    "harness.plugin.options",
    "harness.plugin.selection",
    "harness.plugin.hooks",
    "harness.plugin.fixtures",
    "harness.plugin.verdicts",
    "harness.plugin.reporter",
    "harness.plugin.alone",
]
