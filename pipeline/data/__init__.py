"""From downloads and local files to examples, roles and contexts."""
