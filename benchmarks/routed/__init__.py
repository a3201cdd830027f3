"""Can rows of routed experts train as a standard adapter, and what does it cost?"""
