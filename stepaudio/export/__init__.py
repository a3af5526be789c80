"""Writers of the release's files, from configurations and tensors: what training exports and tests load."""
