"""Images in, WebDataset shards out: convert a folder once, then read any sample by number. No torch here."""
