"""Configuration: all options with defaults and range checks; reading and writing."""
