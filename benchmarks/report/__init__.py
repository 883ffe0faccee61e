"""Results as text, CSV, and one HTML page that needs nothing but itself."""
