"""What travels between clients and the coordinator in fewer bytes: codecs, and what they apply to."""
