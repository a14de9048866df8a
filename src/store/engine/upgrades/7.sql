-- Nodes whose events others deliver (node.role = "edge").
ALTER TABLE node ADD COLUMN role TEXT NOT NULL DEFAULT 'single' CHECK (role IN ('single', 'edge'));
ALTER TABLE node ADD COLUMN edge_through INTEGER NOT NULL DEFAULT 0;
ALTER TABLE topic_incarnation ADD COLUMN last_published INTEGER NOT NULL DEFAULT 0;
ALTER TABLE topic_incarnation ADD COLUMN "partition" INTEGER;
