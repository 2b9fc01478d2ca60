"""What can be converted: folders, lists, tars, Parquet files, rasters and finished shards; one file a kind."""
