"""Domains in, domains out: what is changed, what is remembered, and that the rest stays."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from mirrord.libvirt.rewriting import (
    DomainDisk,
    Served,
    Source,
    backing_paths,
    dac_label,
    difference,
    read_disks,
    redirect,
    restore,
)

# Debian's libvirt0 brings it; what libvirt's own tools validate with.
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
KNOWS_RECONNECT = 9_002_000

RICH = """\
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <uuid>6bda8418-99bd-4235-8d59-c01aea0ed4ef</uuid>
  <title>Web &amp; mail</title>
  <description>one
line and another</description>
  <metadata>
    <app:note xmlns:app='urn:app' by='a&#10;b'><!-- keep me --><app:x>  y </app:x></app:note>
  </metadata>
  <memory unit='KiB'>196608</memory>
  <vcpu placement='static'>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>
  </os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk' snapshot='external' model='virtio-transitional'>
      <driver name='qemu' type='raw' cache='none' io='native' discard='unmap' queues='2'/>
      <source file='/ssd/web &amp; mail.raw' startupPolicy='optional'>
        <seclabel model='dac' relabel='no'/>
      </source>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <iotune>
        <total_iops_sec>500</total_iops_sec>
      </iotune>
      <serial>kept</serial>
      <boot order='1'/>
      <alias name='ua-root'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x0'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/>
      <source dev='/dev/vg/web'/>
      <target dev='sda' bus='scsi'/>
      <readonly/>
      <wwn>5000c50015ea71ad</wwn>
    </disk>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='raw' cache='directsync' error_policy='report'/>
      <source pool='fast' volume='web.raw'/>
      <target dev='vdc' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='hdc' bus='ide' tray='open'/>
      <readonly/>
    </disk>
    <graphics type='vnc' port='-1' passwd='secret'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-name'/>
    <qemu:arg value='x'/>
  </qemu:commandline>
</domain>
"""
VDA = Served("web-vda", "/run/mirrord/nbd/web-vda.sock", "/ssd/web & mail.raw")
SDA = Served("web-sda", "/run/mirrord/nbd/web-sda.sock", "/dev/vg/web")
VDC = Served("web-vdc", "/run/mirrord/nbd/web-vdc.sock", "/pool/web.raw")
ALL = {"vda": VDA, "sda": SDA, "vdc": VDC}


def normal(xml: str) -> str:
    """Return a domain as `redirect` writes one that it has nothing to change in."""
    return redirect(xml, {}, reconnect=True)


def element(xml: str, target: str) -> etree._Element:
    """Return one disk."""
    (disk,) = etree.fromstring(xml).xpath(f"devices/disk[target/@dev='{target}']")
    return disk


def text(found: etree._Element) -> str:
    """Return an element alone, in one line."""
    alone = copy.deepcopy(found)
    etree.cleanup_namespaces(alone)
    written = etree.tostring(alone, encoding="unicode", with_tail=False)
    return re.sub(r">\s+<", "><", written)


def test_what_is_read_of_disks() -> None:
    assert read_disks(RICH) == [
        DomainDisk("vda", path="/ssd/web & mail.raw", cache="direct"),
        DomainDisk("sda", path="/dev/vg/web", read_only=True),
        DomainDisk("vdc", volume=("fast", "web.raw"), cache="direct"),
        DomainDisk("hdc", read_only=True, obstacle="it is a cdrom: only disks are moved"),
    ]


def test_a_disk_is_read_over_nbd_and_keeps_all_else() -> None:
    new = redirect(RICH, {"vda": VDA}, reconnect=True)
    disk = element(new, "vda")
    assert text(disk.find("source")) == (
        '<source protocol="nbd" name="web-vda">'
        '<host transport="unix" socket="/run/mirrord/nbd/web-vda.sock"/>'
        '<reconnect delay="300"/></source>'
    )
    old = element(RICH, "vda")
    assert [each.tag for each in disk] == [each.tag for each in old]
    assert dict(disk.attrib) == {**old.attrib, "type": "network"}
    for tag in ("driver", "target", "iotune", "serial", "boot", "alias", "address"):
        assert text(disk.find(tag)) == text(old.find(tag))
    assert read_disks(new)[0].nbd == ("web-vda", VDA.socket)
    assert read_disks(new)[1:] == read_disks(RICH)[1:]


def test_what_is_not_a_disk_stays_word_for_word() -> None:
    new = redirect(RICH, ALL, reconnect=False)
    for kept in (
        '<domain xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0" type="kvm">',
        '<app:note xmlns:app="urn:app" by="a&#10;b">',
        "<!-- keep me -->",
        "<app:x>  y </app:x>",
        "<description>one\nline and another</description>",
        "<title>Web &amp; mail</title>",
        '<qemu:arg value="-name"/>',
        'passwd="secret"',
        '<target dev="hdc" bus="ide" tray="open"/>',
    ):
        assert kept in new


def test_a_guest_that_cannot_wait_stops_at_an_error() -> None:
    new = redirect(RICH, ALL, reconnect=False)
    assert "reconnect" not in new
    policies = {t: element(new, t).find("driver").get("error_policy") for t in ALL}
    assert policies == {"vda": "stop", "sda": "stop", "vdc": "report"}  # its owner's word counts
    policy = element(redirect(RICH, ALL, reconnect=True), "vda").find("driver").get("error_policy")
    assert policy is None


@pytest.mark.parametrize("reconnect", [True, False])
def test_there_and_back_is_the_same_domain(reconnect: bool) -> None:
    xml = redirect(RICH, ALL, reconnect=reconnect)
    for target, kind in (("sda", "block"), ("vda", "file"), ("vdc", "file")):
        xml = restore(xml, target, Source(kind, ALL[target].location), as_it_was=True)
    assert xml == normal(RICH)


def test_back_after_a_move_is_where_the_disk_is() -> None:
    xml = redirect(RICH, ALL, reconnect=False)
    xml = restore(xml, "vda", Source("block", "/dev/vg/new"), as_it_was=True)
    disk = element(xml, "vda")
    assert disk.get("type") == "block"
    assert dict(disk.find("source").attrib) == {"dev": "/dev/vg/new", "startupPolicy": "optional"}
    assert disk.find("source/seclabel").get("relabel") == "no"
    assert disk.find("driver").get("error_policy") is None
    xml = restore(xml, "vdc", Source("file", "/hdd/web.raw"), as_it_was=True)
    assert text(element(xml, "vdc").find("source")) == '<source file="/hdd/web.raw"/>'
    assert element(xml, "vdc").get("type") == "file"
    assert element(xml, "vdc").find("driver").get("error_policy") == "report"
    assert "urn:mirrord" in xml  # sda is still mirrord's


def test_back_where_the_former_source_leads_elsewhere_now() -> None:
    xml = redirect(RICH, {"vdc": VDC}, reconnect=True)
    xml = restore(xml, "vdc", Source("file", VDC.location), as_it_was=False)
    assert text(element(xml, "vdc").find("source")) == '<source file="/pool/web.raw"/>'


def test_back_of_a_domain_that_was_written_by_hand() -> None:
    xml = redirect(RICH, {"vda": VDA}, reconnect=True)
    root = etree.fromstring(xml)
    root.remove(root.find("metadata"))
    by_hand = etree.tostring(root, encoding="unicode")
    xml = restore(by_hand, "vda", Source("file", VDA.location), as_it_was=True)
    assert text(element(xml, "vda").find("source")) == '<source file="/ssd/web &amp; mail.raw"/>'


def test_an_error_policy_that_was_changed_meanwhile_stays() -> None:
    xml = redirect(RICH, {"vda": VDA}, reconnect=False)
    xml = xml.replace('error_policy="stop"/>', 'error_policy="ignore"/>')
    xml = restore(xml, "vda", Source("file", VDA.location), as_it_was=True)
    assert element(xml, "vda").find("driver").get("error_policy") == "ignore"


def test_a_second_import_remembers_the_second_source() -> None:
    xml = redirect(RICH, {"vda": VDA}, reconnect=True)
    root = etree.fromstring(xml)
    (source,) = root.xpath("devices/disk[target/@dev='vda']/source")
    source.getparent().set("type", "file")  # somebody put it back by hand, the record stayed
    source.getparent().replace(source, etree.Element("source", file="/hdd/other.raw"))
    moved = Served("web-vda", VDA.socket, "/hdd/other.raw")
    xml = redirect(etree.tostring(root, encoding="unicode"), {"vda": moved}, reconnect=True)
    assert xml.count("<mirrord:disk ") == 1
    xml = restore(xml, "vda", Source("file", "/hdd/other.raw"), as_it_was=True)
    assert text(element(xml, "vda").find("source")) == '<source file="/hdd/other.raw"/>'
    assert "urn:mirrord" not in xml


def test_the_difference_shows_what_changes_and_nothing_else() -> None:
    new = redirect(RICH, {"sda": SDA}, reconnect=True)
    lines = difference(RICH, new, "web.xml").splitlines()
    assert lines[:2] == ["--- web.xml", "+++ web.xml (new)"]
    assert [line for line in lines if line.startswith("-")][1:] == [
        '-    <disk type="block" device="disk">',
        '-      <source dev="/dev/vg/web"/>',
    ]
    assert difference(RICH, normal(RICH), "web.xml") == ""


DISK = "<disk type='{kind}' device='{device}'>{driver}{source}<target dev='vda'/>{more}</disk>"
FILE = "<source file='/x.raw'/>"
RAW = "<driver name='qemu' type='raw'/>"


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("it is a cdrom", {"device": "cdrom"}),
        ("it is a floppy", {"device": "floppy"}),
        ("it is a lun", {"device": "lun", "kind": "block"}),
        ("its type is nvme", {"kind": "nvme", "source": "<source type='pci'/>"}),
        ("its type is dir", {"kind": "dir", "source": "<source dir='/x'/>"}),
        ("its type is network", {"kind": "network", "source": "<source protocol='rbd' name='x'/>"}),
        ("it uses NBD at /x.sock, which is no disk's of this daemon",
         {"kind": "network",
          "source": "<source protocol='nbd' name='x'><host transport='unix' socket='/x.sock'/>"
                    "</source>"}),
        ("it has no source", {"source": ""}),
        ("it has no source", {"source": "<source startupPolicy='optional'/>"}),
        ("mode host", {"kind": "volume", "source": "<source pool='p' volume='v' mode='direct'/>"}),
        ("it is qcow2, mirrord moves raw disks: 'qemu-img convert -O raw'",
         {"driver": "<driver name='qemu' type='qcow2'/>"}),
        ("it has a backing file",
         {"more": "<backingStore type='file'><source file='/b'/></backingStore>"}),
        ("QEMU encrypts it", {"more": "<encryption format='luks'/>"}),
        ("QEMU encrypts it",
         {"source": "<source file='/x'><encryption format='luks'/></source>"}),
        ("it is shareable", {"more": "<shareable/>"}),
        ("it is transient", {"more": "<transient/>"}),
        ("its source has slices", {"source": "<source file='/x'><slices/></source>"}),
        ("its source has reservations", {"source": "<source dev='/x'><reservations/></source>"}),
        ("its source has fdgroup", {"source": "<source file='/x' fdgroup='g'/>"}),
    ],
)  # fmt: skip
def test_what_cannot_be_imported(said: str, parts: dict[str, str]) -> None:
    given_parts = {"kind": "file", "device": "disk", "driver": RAW, "source": FILE, "more": ""}
    disk = DISK.format(**{**given_parts, **parts})
    (read,) = read_disks(f"<domain><devices>{disk}</devices></domain>")
    assert read.obstacle is not None
    assert said in read.obstacle


def test_what_lies_behind_disks() -> None:
    xml = (
        "<domain><devices><disk><source file='/top'/><backingStore><source file='/middle'/>"
        "<backingStore><source dev='/dev/base'/><backingStore/></backingStore></backingStore>"
        "</disk></devices></domain>"
    )
    assert backing_paths(xml) == {"/middle", "/dev/base"}


def test_whom_a_host_starts_qemu_as() -> None:
    label = "<baselabel type='kvm'>+64055:+108</baselabel>"
    models = f"<secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model>{label}"
    assert dac_label(f"<capabilities><host>{models}</secmodel></host></capabilities>") == (
        64055, 108
    )  # fmt: skip
    assert dac_label("<capabilities><host><secmodel/></host></capabilities>") is None


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    """Return libvirt's own schema of a domain."""
    if not SCHEMA.exists():
        pytest.skip("needs libvirt's schemas (Debian: libvirt0)")
    return etree.RelaxNG(etree.parse(str(SCHEMA)))


@pytest.mark.parametrize("targets", [["vda"], ["sda", "vdc"], ["vda", "sda", "vdc"]])
def test_libvirts_schema_knows_what_is_written(schema: etree.RelaxNG, targets: list[str]) -> None:
    schema.assertValid(etree.fromstring(RICH))
    reconnect = libvirt.getVersion() >= KNOWS_RECONNECT
    new = redirect(RICH, {target: ALL[target] for target in targets}, reconnect=reconnect)
    schema.assertValid(etree.fromstring(new))
    back = restore(new, targets[0], Source("file", "/elsewhere"), as_it_was=True)
    schema.assertValid(etree.fromstring(back))


# Any domain: what isn't asked for is untouched, and there and back is the same.

WORDS = st.text("ab<&>\"' é\n\t-:", min_size=1, max_size=8)
ATTRIBUTES = st.dictionaries(st.sampled_from(["x", "y", "name", "type"]), WORDS, max_size=3)
TAGS = st.sampled_from(["memory", "os", "{urn:other}thing", "{urn:mirrord:libvirt}x", "a"])


@st.composite
def elements(draw: st.DrawFn, depth: int = 2) -> etree._Element:
    """Draw any element, with namespaces, comments, text and children."""
    made = etree.Element(draw(TAGS), draw(ATTRIBUTES))
    if depth and draw(st.booleans()):
        children = draw(st.lists(elements(depth - 1), max_size=3))
        made.extend(children)
        if draw(st.booleans()):
            made.append(etree.Comment("said"))
    elif draw(st.booleans()):
        made.text = draw(WORDS)
    return made


@st.composite
def disks(draw: st.DrawFn, target: str) -> etree._Element:
    """Draw a disk that can be imported, with its children in any order."""
    kind = draw(st.sampled_from(["file", "block", "volume"]))
    disk = etree.Element("disk", type=kind, device="disk")
    given_source = {"file": ["file"], "block": ["dev"], "volume": ["pool", "volume"]}[kind]
    source = etree.Element("source", {name: f"/{draw(WORDS)}" for name in given_source})
    if draw(st.booleans()):
        etree.SubElement(source, "seclabel", draw(ATTRIBUTES))
    children = [source, etree.Element("target", dev=target)]
    if draw(st.booleans()):
        policies = st.sampled_from([{}, {"error_policy": "stop"}, {"rerror_policy": "report"}])
        children.append(etree.Element("driver", {"name": "qemu", **draw(policies)}))
    children += draw(st.lists(elements(1), max_size=2))
    disk.extend(draw(st.permutations(children)))
    return disk


@st.composite
def domains(draw: st.DrawFn) -> str:
    """Draw a domain with one to three disks."""
    root = etree.Element("domain", nsmap={"qemu": "urn:qemu"})
    etree.SubElement(root, "name").text = "d"
    if draw(st.booleans()):
        metadata = etree.SubElement(root, "metadata")
        metadata.append(etree.Element("{urn:app}note", draw(ATTRIBUTES)))
        metadata.extend(draw(st.lists(elements(), max_size=1)))
    root.extend(draw(st.lists(elements(), max_size=2)))
    devices = etree.SubElement(root, "devices")
    for number in range(draw(st.integers(1, 3))):
        devices.append(draw(disks(f"vd{number}")))
    etree.SubElement(root, "{urn:qemu}commandline").extend(draw(st.lists(elements(), max_size=1)))
    return etree.tostring(root, encoding="unicode")


@given(domains(), st.sets(st.sampled_from(["vd0", "vd1", "vd2"]), min_size=1), st.booleans())
def test_any_domain(xml: str, targets: set[str], reconnect: bool) -> None:
    before = {each.target: each for each in read_disks(xml)}
    served = {t: Served(f"d-{t}", f"/{t}.sock", f"/at/{t}") for t in targets & set(before)}
    new = redirect(xml, served, reconnect=reconnect)
    after = {each.target: each for each in read_disks(new)}
    assert {t: d for t, d in after.items() if t not in served} == {
        t: d for t, d in before.items() if t not in served
    }
    assert {t: d.nbd for t, d in after.items() if t in served} == {
        t: (by.name, by.socket) for t, by in served.items()
    }
    assert stripped(new, set(served)) == stripped(xml, set(served))
    for target, by in served.items():
        new = restore(new, target, Source("file", by.location), as_it_was=True)
    assert new == normal(xml)


def stripped(xml: str, targets: set[str]) -> str:
    """Return a domain without what an import may change of it."""
    root = etree.fromstring(normal(xml), etree.XMLParser(remove_blank_text=True))
    ours = "{urn:mirrord:libvirt}disks"
    for each in root.findall(f"metadata/{ours}"):
        each.getparent().remove(each)
    if root.find("metadata") is not None and not len(root.find("metadata")):
        root.remove(root.find("metadata"))
    for disk in root.iterfind("devices/disk"):
        if disk.find("target").get("dev") in targets:
            del disk.attrib["type"]
            disk.replace(disk.find("source"), etree.Element("source"))
            for driver in disk.findall("driver"):
                driver.attrib.pop("error_policy", None)
    etree.cleanup_namespaces(root)
    return etree.tostring(root, encoding="unicode")
