"""Every option of bpo, its default and its range check; reading and writing them."""
