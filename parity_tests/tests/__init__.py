"""The tests of both layer trees and of the judge."""
