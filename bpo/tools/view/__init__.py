"""`bpo view`: an HTML page for inspecting preference groups."""
