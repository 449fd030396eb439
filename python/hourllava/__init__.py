# SPDX-License-Identifier: Apache-2.0
"""Ask questions about hour-long video."""
