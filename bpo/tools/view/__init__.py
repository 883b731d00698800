"""`bpo view`: a page on which people look at preference groups."""
