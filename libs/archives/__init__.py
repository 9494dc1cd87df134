"""Archives and trees: hostile tars, manifests and blob streams in; canonical trees, deterministic tars and folders out; in bounded memory."""
