"""Make network namespaces, and their links, addresses, routes and rules."""
