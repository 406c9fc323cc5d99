"""Model families, one readable file each, and the layers they share."""
