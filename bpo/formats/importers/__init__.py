"""Other people's files as bpo's records: containers give objects, schemas make annotations or groups of them."""
