"""Who trains next, what rides together, what fits: arithmetic over frozen values.

Standard library only. It reads no clock and no random source, and knows no torch, no SQL and no HTTP.
"""
