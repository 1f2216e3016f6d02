"""Network namespaces and their links, addresses, routes and rules, over rtnetlink and ioctl."""
