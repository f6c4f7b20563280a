//! Metadata contexts, which block status reports.

use sheave_core::Extent;

use crate::wire::allocation_status;

/// A metadata context of this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaContext {
    /// Which extents are allocated and which read as zeroes. Every export has it, since "allocated,
    /// content unknown" is always a correct answer.
    BaseAllocation,
}

impl MetaContext {
    /// All contexts.
    pub const ALL: [Self; 1] = [Self::BaseAllocation];

    /// Its id on the wire once it is selected; never zero, which is what lists show.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::BaseAllocation => 1,
        }
    }

    /// Its name: namespace, colon, leaf.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BaseAllocation => "base:allocation",
        }
    }

    /// Its status of an extent.
    #[must_use]
    pub fn status(self, extent: &Extent) -> u32 {
        match self {
            Self::BaseAllocation => {
                let hole = if extent.hole { allocation_status::HOLE } else { 0 };
                let zero = if extent.zero { allocation_status::ZERO } else { 0 };
                hole | zero
            }
        }
    }

    /// The context that a client's filter names, if there is one.
    pub(crate) fn by_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|context| context.id() == id)
    }

    /// Whether a query of `LIST_META_CONTEXT` matches it: by name, or by its whole namespace.
    pub(crate) fn is_listed_by(self, query: &str) -> bool {
        self.name() == query || query.ends_with(':') && self.name().starts_with(query)
    }

    /// Whether a query of `SET_META_CONTEXT` selects it. A bare namespace selects nothing.
    pub(crate) fn is_set_by(self, query: &str) -> bool {
        self.name() == query
    }

    fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// A set of metadata contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextSet(u32);

impl ContextSet {
    /// No context.
    pub const EMPTY: Self = Self(0);

    /// Adds a context; returns whether it is new.
    pub fn insert(&mut self, context: MetaContext) -> bool {
        let is_new = !self.contains(context);
        self.0 |= context.bit();
        is_new
    }

    /// Whether the context is in it.
    #[must_use]
    pub fn contains(self, context: MetaContext) -> bool {
        self.0 & context.bit() != 0
    }

    /// Whether it holds no context.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The number of contexts.
    #[must_use]
    pub fn len(self) -> usize {
        self.iter().count()
    }

    /// Its contexts.
    pub fn iter(self) -> impl Iterator<Item = MetaContext> {
        MetaContext::ALL.into_iter().filter(move |context| self.contains(*context))
    }
}
