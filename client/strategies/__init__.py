"""What a strategy does at a site, one algorithm a file, and what a site keeps for it between rounds."""
