"""Pages for people over the Store's reading queries: drawn by the server, without a line of script."""
