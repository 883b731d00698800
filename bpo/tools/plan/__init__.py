"""`bpo plan`: memory and speed estimates before you request nodes."""
