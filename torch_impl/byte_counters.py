"""What was sent, in bytes."""

from dataclasses import dataclass


@dataclass
class ByteCounters:
    """CompressionStats's bytes: of the last step, and of all steps."""

    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_uncompressed: int = 0
    total_bytes_sent: int = 0
    total_bytes_received: int = 0
    total_bytes_uncompressed: int = 0

    def count(self, sent: int, received: int, uncompressed: int) -> None:
        """Counts a step."""
        self.bytes_sent, self.bytes_received, self.bytes_uncompressed = sent, received, uncompressed
        self.total_bytes_sent += sent
        self.total_bytes_received += received
        self.total_bytes_uncompressed += uncompressed
