"""The pure core in a world of its own, where seeds decide everything: what is lost, repeated and delayed, who dies, and when."""
