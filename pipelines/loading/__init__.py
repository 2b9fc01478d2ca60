"""From shards to batches: `open_loader`, the memory of batches, masks, and the settings of the section `data`."""
