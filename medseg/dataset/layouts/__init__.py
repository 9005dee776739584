"""One file a family of layouts; `reading.LAYOUTS` lists them."""
