"""Where files lie: local folders and remote stores behind one interface, files that appear whole or not at all, and the cache."""
