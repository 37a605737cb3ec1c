"""Cases that prove and time kernels on the device that is there, each in a child."""
