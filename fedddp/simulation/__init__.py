"""What a simulation decides: who takes part, how long clients take, who is malicious."""
