"""Give a run namespaces of its own, and run calls and programs in any of them."""
