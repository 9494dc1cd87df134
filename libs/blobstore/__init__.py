"""Content-addressed bytes in an object store: blobs by their sha256, gathered into packs, within a team."""
