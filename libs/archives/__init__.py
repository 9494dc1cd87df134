"""Archives and trees: hostile tar streams in, canonical trees and deterministic tar streams out, in constant memory."""
