"""The commands of `fastssl` that are more than a call: their options and what they print."""
