"""Images, captions and class names: from files, shards, tables and URLs to tensors."""
